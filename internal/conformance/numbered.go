package conformance

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"math/rand/v2"
)

// Numbered returns content that says its own number and checksum, so that a
// reader knows whether it is whole. Sizes differ, up to 200 KB.
func Numbered(n int) []byte {
	rng := rand.New(rand.NewPCG(5, uint64(n)))
	body := make([]byte, rng.IntN(200_000))
	for i := 0; i < len(body); i += 64 {
		body[i] = byte(rng.Uint32())
	}
	sum := sha256.Sum256(body)
	return append(fmt.Appendf(nil, "%d %s\n", n, hex.EncodeToString(sum[:])), body...)
}

// CheckNumbered returns the number of whole content.
func CheckNumbered(b []byte) (int, error) {
	head, body, ok := bytes.Cut(b, []byte("\n"))
	var n int
	var sum string
	if _, err := fmt.Sscanf(string(head), "%d %s", &n, &sum); err != nil || !ok {
		return 0, fmt.Errorf("%d bytes, head %q: %v", len(b), head, err)
	}
	if got := sha256.Sum256(body); hex.EncodeToString(got[:]) != sum {
		return 0, fmt.Errorf("content %d of %d bytes is torn", n, len(b))
	}
	return n, nil
}
