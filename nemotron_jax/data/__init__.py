"""Text to packed batches: sources, held_out, tokenizer, corpus, mixture, packing, loader.

`corpus.prepare` turns a DataConfig into a tokenizer and token arrays; `loader.TrainLoader` turns
those into batches. All of it is NumPy on the host; nothing here runs on a device.
"""
