"""Device code of alps_kernels: Triton kernels and their helpers. Imports: triton.

`ABI` names the calling convention of the kernels; `alps_kernels.ops` refuses another one.
"""

ABI = 6
