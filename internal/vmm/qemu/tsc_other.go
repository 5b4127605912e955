//go:build !amd64

package qemu

// rdtsc is not there: guests of other architectures need no frequency.
func rdtsc() uint64 { return 0 }

const hasTSC = false
