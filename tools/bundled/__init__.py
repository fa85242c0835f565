"""Parts of `tools/train_bundled_pair.py`: corpus, tokenizer, models, training, evaluation, model card."""
