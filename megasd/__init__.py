"""megasd: post-training in which one set of Megatron weights is both student and teacher."""

__version__ = "0.1.0"
