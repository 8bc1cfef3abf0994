"""Language models of Hugging Face that generate: captured over a static cache, quantized and lowered.

Enters: a causal language model. Leaves: a `Decoder`, of two graphs or two programs.
"""

from lowering.language_models.decoder import CachedDecoder, Decoder, capture_decoder

__all__ = ["CachedDecoder", "Decoder", "capture_decoder"]
