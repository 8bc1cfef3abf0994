"""Native int8 regions: connected int8 parts of a Q/DQ graph as one op each, on kernels of our own.

In: a Q/DQ graph. Out: `program.NativeProgram`, which is ready at once, and the same regions inside of what
`lowering.to_inductor` compiles. ``kernels/README.md`` explains the C++.
"""
