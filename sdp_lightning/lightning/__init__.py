"""The Lightning layer: module, data module, the callback that moves versions, loaders, stops."""
