package microsandbox_test

import (
	"context"
	"fmt"
	"io"
	"log"
	"os"
	"path/filepath"
	"strings"

	"github.com/microsandbox-go/microsandbox"
)

// inTemporaryHome keeps an example's volumes out of the user's home.
func inTemporaryHome() (restore func()) {
	dir, err := os.MkdirTemp("", "msb-example-")
	if err != nil {
		log.Fatal(err)
	}
	b, err := microsandbox.NewLocalBackend(filepath.Join(dir, "home"))
	if err != nil {
		log.Fatal(err)
	}
	microsandbox.SetDefaultBackend(b)
	return func() {
		microsandbox.SetDefaultBackend(nil)
		os.RemoveAll(dir)
	}
}

func Example() {
	defer inTemporaryHome()()
	ctx := context.Background()
	vol, err := microsandbox.CreateVolume(ctx, "pip-cache")
	if err != nil {
		log.Fatal(err)
	}
	if err := vol.FS().WriteString(ctx, "/note.txt", "shared cache"); err != nil {
		log.Fatal(err)
	}
	note, err := vol.FS().ReadString(ctx, "/note.txt")
	fmt.Println(note, err)
	// Output: shared cache <nil>
}

func ExampleCreateVolume() {
	defer inTemporaryHome()()
	ctx := context.Background()
	_, err := microsandbox.CreateVolume(ctx, "cache",
		microsandbox.WithVolumeQuota(microsandbox.GiB(1)),
		microsandbox.WithVolumeLabels(map[string]string{"team": "ml"}))
	fmt.Println(err)
	_, err = microsandbox.CreateVolume(ctx, "cache")
	fmt.Println(microsandbox.IsKind(err, microsandbox.ErrVolumeAlreadyExists))
	// Output:
	// <nil>
	// true
}

func ExampleNewVolumeBuilder() {
	defer inTemporaryHome()()
	ctx := context.Background()
	vol, err := microsandbox.NewVolumeBuilder("models").Quota(1024).Label("team", "ml").Create(ctx)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(vol.Name(), vol.Kind())
	// Output: models dir
}

func ExampleListVolumes() {
	defer inTemporaryHome()()
	ctx := context.Background()
	for _, name := range []string{"first", "second"} {
		if _, err := microsandbox.CreateVolume(ctx, name); err != nil {
			log.Fatal(err)
		}
	}
	volumes, err := microsandbox.ListVolumes(ctx)
	if err != nil {
		log.Fatal(err)
	}
	for _, v := range volumes {
		fmt.Println(v.Name())
	}
	// Output:
	// second
	// first
}

func ExampleVolumeFs_WriteStream() {
	defer inTemporaryHome()()
	ctx := context.Background()
	vol, err := microsandbox.CreateVolume(ctx, "data")
	if err != nil {
		log.Fatal(err)
	}
	sink, err := vol.FS().WriteStream(ctx, "/logs/today.txt")
	if err != nil {
		log.Fatal(err)
	}
	defer sink.Abort() // does nothing after Close
	for i := range 3 {
		fmt.Fprintf(sink, "line %d\n", i)
	}
	if err := sink.Close(); err != nil { // now the file is there, all of it
		log.Fatal(err)
	}
	stream, err := vol.FS().ReadStream(ctx, "/logs/today.txt")
	if err != nil {
		log.Fatal(err)
	}
	defer stream.Close()
	var text strings.Builder
	_, err = io.Copy(&text, stream)
	fmt.Print(text.String(), err)
	// Output:
	// line 0
	// line 1
	// line 2
	// <nil>
}

func ExampleVolumeFs_Exists() {
	defer inTemporaryHome()()
	ctx := context.Background()
	vol, err := microsandbox.CreateVolume(ctx, "data")
	if err != nil {
		log.Fatal(err)
	}
	if ok, err := vol.FS().Exists(ctx, "/seed.txt"); err == nil && !ok {
		err = vol.FS().WriteString(ctx, "/seed.txt", "hello")
		fmt.Println("seeded", err)
	}
	err = vol.FS().Copy(ctx, "/seed.txt", "/backup/seed.txt")
	entries, listErr := vol.FS().List(ctx, "/")
	fmt.Println(err, listErr)
	for _, e := range entries {
		fmt.Println(e.Path, e.Kind)
	}
	// Output:
	// seeded <nil>
	// <nil> <nil>
	// /backup directory
	// /seed.txt file
}
