"""The two custom ops, and what moves cache rows, as Triton kernels compiled ahead of time.

`attention.py`, `injection.py` and `rows.py` hold the source; `compiler.py` makes a cubin and its description
(`swiftvideo.runtime.plugins.kernel.KernelSpec`) for a compute capability, on any machine. Nothing here launches.
"""
