"""What this machine and this installation offer: the C++ library, Triton, device facts."""
