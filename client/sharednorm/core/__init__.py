"""What every other room uses: types, limits, checks, the state of a layer."""
