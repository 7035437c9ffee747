"""Exported models on the Hugging Face hub: rates for their cards, and uploads in one commit."""
