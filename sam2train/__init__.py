"""Fine-tune the video memory of SAM 2 and trust the numbers. Import the modules by name."""

__version__ = "0.1.0"
