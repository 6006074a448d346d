"""Certificates of small heads: the exact least score over boxes of hidden states, and repair of what is found."""
