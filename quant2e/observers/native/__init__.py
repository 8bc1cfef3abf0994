"""One-pass C++ kernels of the observers, built once per machine where there is a compiler."""
