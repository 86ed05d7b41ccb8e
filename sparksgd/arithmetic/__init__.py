"""What makes bits equal: numerics, instruction sets, seeds, flat vectors, the addition tree."""
