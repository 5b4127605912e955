// Typicalflow is what volumes are for: a cache is seeded from the host, filled by
// a program in a sandbox, and outlives the sandbox.
//
//	go run ./examples/typicalflow localhost:5000/python
//
// Output:
//
//	seeded from the host: shared cache
//	the guest read: shared cache
//	in the cache after the sandbox is gone: [/note.txt /wheels]
package main

import (
	"context"
	"fmt"
	"log"
	"os"
	"os/signal"

	"github.com/microsandbox-go/microsandbox"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	image := "python"
	if len(os.Args) > 1 {
		image = os.Args[1]
	}
	if err := run(ctx, image); err != nil {
		log.Fatal(err)
	}
}

func run(ctx context.Context, image string) error {
	vol, err := microsandbox.CreateVolume(ctx, "pip-cache")
	if err != nil {
		return err
	}
	if err := vol.FS().WriteString(ctx, "/note.txt", "shared cache"); err != nil {
		return err
	}
	fmt.Println("seeded from the host: shared cache")

	sb, err := microsandbox.CreateSandbox(ctx, "api", microsandbox.WithImage(image),
		microsandbox.WithMounts(map[string]microsandbox.MountConfig{
			"/root/.cache/pip": microsandbox.Mount.Named("pip-cache", microsandbox.MountOptions{}),
		}))
	if err != nil {
		return err
	}
	defer sb.Close() // ends the sandbox should we return early

	// In place of pip install, which needs a network.
	out, err := sb.Shell(ctx, `cat /root/.cache/pip/note.txt && mkdir -p /root/.cache/pip/wheels && echo wheel > /root/.cache/pip/wheels/requests.whl`)
	if err != nil {
		return err
	}
	fmt.Println("the guest read:", out.Stdout())
	if err := sb.Stop(ctx); err != nil {
		return err
	}
	if err := microsandbox.RemoveSandbox(ctx, "api"); err != nil {
		return err
	}

	entries, err := vol.FS().List(ctx, "/")
	if err != nil {
		return err
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Path)
	}
	fmt.Println("in the cache after the sandbox is gone:", names)
	return nil
}
