# The image of the demo and of the in-guest tests. It is not built in parallel
# with itself: the script replaces build/demo-image as a whole.

.PHONY: demo-image
demo-image: ## Build the demo image from Debian packages into build/demo-image
	@scripts/demo-image.sh
