"""Model families, one file each: plain `nn.Module`s that know nothing of training."""
