//go:build !amd64

package storetest

var legacyMutating []uint32

// legacyOpen is no system call's number.
const legacyOpen = 1 << 30
