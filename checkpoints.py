def adapt_full_precision(sd, model): return sd
