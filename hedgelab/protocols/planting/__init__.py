"""A randomised trial of hedging inside activations: features planted in arms, by lot, and what SAEs make of them."""
