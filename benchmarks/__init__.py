"""Measurements that anybody can repeat. Each prints a table, and writes it under benchmarks/results/ when asked to."""
