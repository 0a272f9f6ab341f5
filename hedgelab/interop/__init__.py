"""SAEs from and for the libraries of the field: SAELens, sparsify, dictionary_learning. None of them is needed here."""
