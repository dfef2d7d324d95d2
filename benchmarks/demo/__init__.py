"""The demo checkpoint: a small, real Stable Diffusion 1.x, trained from scratch on pictures that a grammar draws.

    python -m benchmarks.demo.train out/demo        # everything, resumable; the checkpoint is out/demo/checkpoint

`scenes` is the grammar, `draw` the pictures, `networks` the four parts of the checkpoint, `vae`, `words` and
`denoiser` the three stages, `train` the command.
"""
