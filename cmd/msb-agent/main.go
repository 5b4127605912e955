// Command msb-agent is PID 1 of a sandbox. It is not run by people: the build
// embeds it in msb, which boots it as /init of the guest's initramfs.
package main

import "github.com/microsandbox-go/microsandbox/internal/guest"

func main() { guest.Main() }
