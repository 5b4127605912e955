package main

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/microsandbox-go/microsandbox"
)

// completionTime is how long somebody who pressed Tab is kept waiting.
const completionTime = 2 * time.Second

func newCompletionCmd() *cobra.Command {
	shells := []string{"bash", "zsh", "fish"}
	return &cobra.Command{
		Use:   "completion bash|zsh|fish",
		Short: "Print the script that completes commands, flags and names in a shell",
		Long: `Print the script that completes commands, flags, and the names of sandboxes,
volumes and images in a shell.`,
		Example: `  source <(msb completion bash)                            # for this shell
  msb completion bash >~/.local/share/bash-completion/completions/msb
  msb completion zsh >"${fpath[1]}/_msb"
  msb completion fish >~/.config/fish/completions/msb.fish`,
		Args: args(cobra.ExactArgs(1)), ValidArgs: shells, DisableFlagsInUseLine: true,
		RunE: func(cmd *cobra.Command, argv []string) error {
			root, out := cmd.Root(), cmd.OutOrStdout()
			switch argv[0] {
			case "bash":
				if _, err := fmt.Fprint(out, bashWords); err != nil {
					return err
				}
				return root.GenBashCompletionV2(out, true)
			case "zsh":
				return root.GenZshCompletion(out)
			case "fish":
				return root.GenFishCompletion(out, true)
			}
			return usagef("msb completion: unknown shell %q: %s", argv[0], strings.Join(shells, ", "))
		},
	}
}

// bashWords stands in for the two functions of the package bash-completion that
// the script calls, where that package is not installed: words are split at
// spaces alone, not at the colon of an image, and what bash takes as the
// beginning of the word, up to the last colon, is cut off again.
const bashWords = `# bash completion for msb; works with and without the package bash-completion
if ! declare -F _get_comp_words_by_ref >/dev/null; then
    _get_comp_words_by_ref() {
        local line=${COMP_LINE:0:COMP_POINT}
        read -ra words <<<"$line"
        [[ $line == *[[:space:]] ]] && words+=("")
        cword=$((${#words[@]} - 1))
        cur=${words[cword]}
        prev=${words[cword > 0 ? cword - 1 : 0]}
    }
fi
if ! declare -F __ltrim_colon_completions >/dev/null; then
    __ltrim_colon_completions() {
        local i prefix=${1%"${1##*:}"}
        [[ $1 == *:* && $COMP_WORDBREAKS == *:* ]] || return 0
        for i in "${!COMPREPLY[@]}"; do COMPREPLY[i]=${COMPREPLY[i]#"$prefix"}; done
    }
fi

`

// afterDash reports whether the word to complete follows a "--". The command
// line itself has to be looked at: cobra parses it with a "--" of its own, and
// ArgsLenAtDash tells of that.
func afterDash() bool { return slices.Contains(os.Args[:max(0, len(os.Args)-1)], "--") }

// completeSandboxes completes names of sandboxes: one, or any number when many
// is set. What is after "--" belongs to the program.
func completeSandboxes(many bool) cobra.CompletionFunc {
	return func(cmd *cobra.Command, args []string, prefix string) ([]cobra.Completion, cobra.ShellCompDirective) {
		if afterDash() {
			return nil, cobra.ShellCompDirectiveDefault
		}
		if len(args) > 0 && !many {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		names, directive := completeSandboxName(cmd, nil, prefix)
		return slices.DeleteFunc(names, func(n string) bool { return slices.Contains(args, n) }), directive
	}
}

func completeSandboxName(*cobra.Command, []string, string) ([]cobra.Completion, cobra.ShellCompDirective) {
	ctx, cancel := context.WithTimeout(context.Background(), completionTime)
	defer cancel()
	page, err := microsandbox.ListSandboxes(ctx)
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	var names []cobra.Completion
	for _, h := range page.Sandboxes {
		names = append(names, h.Name())
	}
	return names, cobra.ShellCompDirectiveNoFileComp
}

// completeImages offers the references of this machine.
func completeImages(*cobra.Command, []string, string) ([]cobra.Completion, cobra.ShellCompDirective) {
	ctx, cancel := context.WithTimeout(context.Background(), completionTime)
	defer cancel()
	imgs, err := microsandbox.Image.List(ctx)
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	names := make([]cobra.Completion, 0, len(imgs))
	for _, i := range imgs {
		names = append(names, i.Reference())
	}
	return names, cobra.ShellCompDirectiveNoFileComp
}

// completeImageOfSandbox completes the one image of run and create.
func completeImageOfSandbox(cmd *cobra.Command, args []string, prefix string) ([]cobra.Completion, cobra.ShellCompDirective) {
	switch {
	case afterDash():
		return nil, cobra.ShellCompDirectiveDefault
	case len(args) > 0:
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	return completeImages(cmd, args, prefix)
}

// completeVolumeMount completes the SOURCE of a mount: volumes with the colon
// that follows, or files once it is a path.
func completeVolumeMount(_ *cobra.Command, _ []string, prefix string) ([]cobra.Completion, cobra.ShellCompDirective) {
	if strings.HasPrefix(prefix, "/") || strings.HasPrefix(prefix, ".") {
		return nil, cobra.ShellCompDirectiveDefault
	}
	ctx, cancel := context.WithTimeout(context.Background(), completionTime)
	defer cancel()
	volumes, err := microsandbox.ListVolumes(ctx)
	if err != nil || strings.Contains(prefix, ":") {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	var names []cobra.Completion
	for _, v := range volumes {
		names = append(names, v.Name()+":/")
	}
	return names, cobra.ShellCompDirectiveNoFileComp | cobra.ShellCompDirectiveNoSpace
}
