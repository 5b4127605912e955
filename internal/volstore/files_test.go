package volstore

import (
	"bytes"
	"encoding/json"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/microsandbox-go/microsandbox/internal/records"
)

// TestNoteIsJSON: a note is, byte for byte, what json.Marshal makes of it.
func TestNoteIsJSON(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		text := rapid.OneOf(rapid.StringMatching("[a-z0-9.-]{0,9}"), rapid.String())
		v := &records.Volume{
			ID: text.Draw(t, "id"), Name: text.Draw(t, "name"), Kind: text.Draw(t, "kind"),
			QuotaMiB: rapid.Uint32().Draw(t, "quota"), CapacityBytes: rapid.Int64().Draw(t, "capacity"),
			DiskFormat: text.Draw(t, "format"), DiskFstype: text.Draw(t, "fstype"),
			Labels:    rapid.MapOfN(text, text, 0, 4).Draw(t, "labels"),
			CreatedAt: time.Unix(rapid.Int64Range(0, 1<<34).Draw(t, "s"), rapid.Int64Range(0, 1e9-1).Draw(t, "ns")).UTC(),
			Identity:  records.Identity{Dev: rapid.Uint64().Draw(t, "dev"), Ino: rapid.Uint64().Draw(t, "ino"), BirthNS: rapid.Int64().Draw(t, "birth")},
		}
		want, err := json.Marshal(note{
			Version: noteVersion, ID: v.ID, Name: v.Name, Kind: v.Kind, QuotaMiB: v.QuotaMiB, CapacityBytes: v.CapacityBytes,
			DiskFormat: v.DiskFormat, DiskFstype: v.DiskFstype, Labels: v.Labels, CreatedAt: v.CreatedAt,
			Dev: v.Identity.Dev, Ino: v.Identity.Ino, BirthNS: v.Identity.BirthNS,
		})
		if err != nil {
			t.Fatal(err)
		}
		if got := encodeNote(v); !bytes.Equal(got, append(want, '\n')) {
			t.Errorf("note\n%s, want\n%s", got, want)
		}
	})
}
