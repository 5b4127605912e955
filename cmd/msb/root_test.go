package main

import (
	"strings"
	"testing"

	"github.com/spf13/cobra"
)

// Every command is found under every name when only its branch is made, and is
// the same as in the whole tree.
func TestBranches(t *testing.T) {
	var walk func(c *cobra.Command, path []string)
	walk = func(c *cobra.Command, path []string) {
		for _, sub := range c.Commands() {
			for _, word := range append([]string{sub.Name()}, sub.Aliases...) {
				argv := append(path[:len(path):len(path)], word)
				root := newRootCmd(argv...)
				got, rest, err := root.Find(argv)
				if err != nil || len(rest) > 0 || got.UseLine() != sub.UseLine() || got.GroupID != sub.GroupID {
					t.Errorf("%s is %q, not %q (%v)", strings.Join(argv, " "), got.UseLine(), sub.UseLine(), err)
				}
				if sub.Name() != "help" && len(root.Commands()) > 1 {
					t.Errorf("%s makes %d commands", strings.Join(argv, " "), len(root.Commands()))
				}
			}
			walk(sub, append(path[:len(path):len(path)], sub.Name()))
		}
	}
	walk(newRootCmd(), nil)
}
