package main

import (
	"bytes"
	"testing"

	"pgregory.net/rapid"
)

// What is written by hand is what the encoder writes.
func TestVolumeJSON(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		text := rapid.OneOf(rapid.StringMatching("[ -~]{0,20}"), rapid.String())
		number := rapid.Ptr(rapid.Uint64(), true)
		v := volumeJSON{
			CapacityBytes: number.Draw(t, "capacity"), CreatedAt: rapid.Ptr(text, true).Draw(t, "created"),
			DiskFormat: rapid.Ptr(text, true).Draw(t, "format"), DiskFstype: rapid.Ptr(text, true).Draw(t, "fstype"),
			Kind: text.Draw(t, "kind"), Labels: rapid.MapOf(text, text).Draw(t, "labels"), Name: text.Draw(t, "name"),
			QuotaMiB: rapid.Ptr(rapid.Uint32(), true).Draw(t, "quota"), UsedBytes: number.Draw(t, "used"),
		}
		var want bytes.Buffer
		if err := printJSON(&want, []volumeJSON{v}); err != nil {
			t.Fatal(err)
		}
		if got := string(v.appendJSON([]byte("[\n  "))) + "\n]\n"; got != want.String() {
			t.Errorf("got %s\nwant %s", got, want.String())
		}
	})
}
