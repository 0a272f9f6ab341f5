"""Experiments made of several fits, such as the hedging degree."""
