"""Measurements that need a GPU: correctness on a device, kernels against their floors, steps by arm, stalls."""
