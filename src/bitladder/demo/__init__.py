"""The embedded model and data of `recipes/demo.yaml`: a tiny Qwen2.5-VL that reads handwritten digits.

`qwen2_5_vl_digits/` is a Hugging Face directory as the real one; `data/` holds image+text pairs and captions;
`train.py` made both.
"""
