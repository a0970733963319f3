"""nn.Module -> traced graph -> channel groups -> hierarchy -> GraphInstance."""
