package supervisor

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/microsandbox-go/microsandbox/internal/agentproto"
	"github.com/microsandbox-go/microsandbox/internal/errdefs"
	"github.com/microsandbox-go/microsandbox/internal/records"
	"github.com/microsandbox-go/microsandbox/internal/volstore"
)

// TestShortImageIsRefused: an image that has lost its end is damaged, whatever
// its file system looks like.
func TestShortImageIsRefused(t *testing.T) {
	f, err := os.Create(filepath.Join(t.TempDir(), "disk.raw"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	v := &volstore.Volume{Volume: records.Volume{Name: "dv", CapacityBytes: 32 << 20}, DiskPath: f.Name()}
	for size, whole := range map[int64]bool{0: false, 1 << 20: false, 32 << 20: true, 33 << 20: true} {
		if err := f.Truncate(size); err != nil {
			t.Fatal(err)
		}
		err := wholeImage(v, f)
		if whole != (err == nil) || err != nil && (!errdefs.Is(err, errdefs.Filesystem) || !strings.Contains(err.Error(), `"dv"`)) {
			t.Errorf("%d bytes: %v", size, err)
		}
	}
}

// TestBootFailedHints: a file of the image where a mount must be has a way out.
func TestBootFailedHints(t *testing.T) {
	for message, hint := range map[string]bool{
		"not a directory": true, "mkdir /etc/passwd: not a directory": true, "mkdir /x: file exists": true, "no such device": false,
	} {
		var e *errdefs.Error
		err := bootFailed(agentproto.BootFailed{Step: "mount /x", Message: message})
		if !errors.As(err, &e) || (e.Hint != "") != hint || !strings.Contains(e.Msg, "mount /x: "+message) {
			t.Errorf("%q: %+v", message, err)
		}
	}
}
