"""One scheduler that knows every slice: a pure core, its policies, and the workers it drives."""
