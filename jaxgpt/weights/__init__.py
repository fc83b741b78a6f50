"""A model's weights: any model opened (a run, a Hugging Face folder), GPT-2's names and layouts, export."""
