"""The parallel engine: specs, axes, attention, and the hooks that apply a family's plan."""
