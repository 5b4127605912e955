// Package fetchbin embeds the program msb-fetch that the build has put into its
// folder bin. On a clean clone there is none, and everything but pulling and
// loading images and adding kernels works without it.
package fetchbin

import "embed"

//go:embed all:bin
var files embed.FS

// Bytes returns the program, nil when msb was built without it.
func Bytes() []byte {
	b, err := files.ReadFile("bin/msb-fetch")
	if err != nil {
		return nil
	}
	return b
}
