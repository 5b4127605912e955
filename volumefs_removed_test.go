package microsandbox

import (
	"testing"

	"github.com/microsandbox-go/microsandbox/internal/failpoint"
)

// TestRemovedWhileWriting: a volume is removed, and made again, at each instant
// inside a write: what lands in the trash is not acknowledged, and the new volume
// stays empty.
func TestRemovedWhileWriting(t *testing.T) {
	ctx := t.Context()
	writes := map[string]func(fs *VolumeFs) error{
		"write":   func(fs *VolumeFs) error { return fs.WriteString(ctx, "d/f", "new") },
		"replace": func(fs *VolumeFs) error { return fs.WriteString(ctx, "old", "new") },
		"copy":    func(fs *VolumeFs) error { return fs.Copy(ctx, "old", "d/f") },
		"stream": func(fs *VolumeFs) error {
			w, err := fs.WriteStream(ctx, "d/f")
			if err != nil {
				return err
			}
			if _, err := w.Write([]byte("new")); err != nil {
				return err
			}
			return w.Close()
		},
	}
	for name, write := range writes {
		for _, point := range []string{"volumefs.filled", "volumefs.replace", "volumefs.placed"} {
			t.Run(name+"/"+point, func(t *testing.T) {
				useHome(t)
				v, err := CreateVolume(ctx, "v")
				check(t, err)
				check(t, v.FS().WriteString(ctx, "old", "old"))
				var again *Volume
				disarm := failpoint.Arm(point, func() error {
					check(t, RemoveVolume(ctx, "v"))
					again, err = CreateVolume(ctx, "v")
					return err
				})
				err = write(v.FS())
				disarm()
				if again == nil {
					check(t, err) // not on this way
					return
				}
				wantErrKind(t, err, ErrVolumeNotFound)
				if list, err := again.FS().List(ctx, ""); err != nil || len(list) != 0 {
					t.Errorf("the new volume has %v, %v", list, err)
				}
			})
		}
	}
}
