"""Native int8 regions: connected int8 parts of a Q/DQ graph as one op each, on kernels of our own.

In: a Q/DQ graph. Out: a graph that calls the regions: run at once by a `program.NativeProgram`, or compiled with the
rest by `lowering.to_inductor`. ``kernels/README.md`` explains the C++.
"""
