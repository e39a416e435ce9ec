"""Tools of this repository's developers: `python -m tools.new_op`, `tools.check_kernel`, `tools.gpu_check`
(make new-op, check-kernel, gpu-check), and in `tools.docs` what draws the docs' pictures and tables."""
