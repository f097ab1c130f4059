"""How GPUs are cut: geometry, latency tables, and the door to NVML. Imports no other room."""
