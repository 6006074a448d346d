"""From raw rows to token ids: adapters, sources, cleaning, tokenizing, and the tables that show what happened."""
