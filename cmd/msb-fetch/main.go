// Command msb-fetch speaks with registries and decompresses what they sent, for
// msb, which contains it and starts it; it is nothing to be started by hand.
package main

import (
	"os"

	"github.com/microsandbox-go/microsandbox/internal/fetch/fetcher"
)

func main() { os.Exit(fetcher.Main(os.Args[1:])) }
