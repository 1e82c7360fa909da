"""What only a GPU can say: correctness on a device, kernels against their floors, steps by arm, and what stalls them."""
