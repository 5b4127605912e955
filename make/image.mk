# The image of the demo and of the in-guest tests. The script locks: two makes
# at a time are no harm.

.PHONY: demo-image
demo-image: ## Build the demo image from Debian packages into build/demo-image
	@GO=$(GO) scripts/demo-image.sh
