package records

import (
	"os"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/home"
)

// TestJournalIsRestored: the next writer gives a journal that was deleted, or cut,
// its size back, with blocks; several at once do no harm, a reader does not write.
func TestJournalIsRestored(t *testing.T) {
	for name, spoil := range map[string]func(path string) error{
		"deleted": os.Remove,
		"cut":     func(path string) error { return os.Truncate(path, 4096) },
		"empty":   func(path string) error { return os.Truncate(path, 0) },
	} {
		h := home.Dir(t.TempDir())
		if err := closed(Open(t.Context(), h)); err != nil {
			t.Fatal(err)
		}
		journal := h.DB() + "-journal"
		if err := spoil(journal); err != nil {
			t.Fatal(err)
		}
		before := stampOf(journal)
		if err := closed(OpenReader(t.Context(), h)); err != nil || stampOf(journal) != before {
			t.Errorf("%s: a reader: %v, %+v", name, err, stampOf(journal))
		}
		var all sync.WaitGroup
		for i := range 4 {
			all.Go(func() {
				d, err := Open(t.Context(), h)
				if err != nil {
					t.Error(err)
					return
				}
				defer d.Close()
				id := string(rune('a' + i))
				if err := d.InsertVolume(t.Context(), &Volume{ID: id, Name: id, Kind: "dir"}); err != nil {
					t.Error(err)
				}
			})
		}
		all.Wait()
		var st unix.Stat_t
		if err := unix.Stat(journal, &st); err != nil || st.Size < journalSize || st.Blocks*512 < journalSize {
			t.Errorf("%s: %d bytes in %d blocks, %v", name, st.Size, st.Blocks, err)
		}
		d, err := OpenReader(t.Context(), h)
		if err != nil {
			t.Fatal(err)
		}
		if all, err := d.ListVolumes(t.Context()); err != nil || len(all) != 4 {
			t.Errorf("%s: %d volumes, %v", name, len(all), err)
		}
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	}
}
