"""Bytes that clients have, into the tensors that models take. Imports no other room."""
