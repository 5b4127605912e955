//go:build !amd64

package qemu

import (
	"encoding/json"
	"os"
)

// ProbeMain is the probe's process. There is no probe for this architecture yet.
func ProbeMain([]string) int {
	_ = json.NewEncoder(os.Stdout).Encode(Probe{Reason: "no probe for this architecture yet"})
	return 0
}
