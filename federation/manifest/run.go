package manifest

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/entente-mesh/entente/ca/selector"
	"github.com/entente-mesh/entente/internal/yamlfile"
)

type runSpec struct {
	yamlfile.Pos
	User    string   `yaml:"user"`
	UID     *uint32  `yaml:"uid"`
	GID     *uint32  `yaml:"gid"`
	Path    string   `yaml:"path"`
	Groups  []uint32 `yaml:"groups"` // supplementary ones
	SHA256  string   `yaml:"sha256"`
	Cmdline string   `yaml:"cmdline"` // digest of the command line
	Systemd string   `yaml:"systemd"` // unit
	// Container is the id that its runtime gave it.
	Container string   `yaml:"container"`
	Run       string   `yaml:"run"` // what `entente run` registered
	Hosts     []string `yaml:"hosts,required"`
}

// keys are the keys of run with the kinds of selectors that they say, in the order in
// which a record has them.
func (r *runSpec) keys() []runKey {
	return []runKey{
		{selector.Unit, &r.Systemd}, {selector.Container, &r.Container}, {selector.User, &r.User},
		{selector.UID, &r.UID}, {selector.GID, &r.GID}, {selector.Group, &r.Groups},
		{selector.Path, &r.Path}, {selector.SHA256, &r.SHA256}, {selector.Cmdline, &r.Cmdline}, {selector.Run, &r.Run},
	}
}

type runKey struct {
	kind string
	said any // *string, **uint32 or *[]uint32
}

// selectors in a fixed order, so that the same file gives the same record.
func (r *runSpec) selectors() (list []string, err error) {
	for _, key := range r.keys() {
		add := func(value string) { list = append(list, key.kind+":"+value) }
		number := func(n uint32) { add(strconv.FormatUint(uint64(n), 10)) }
		switch said := key.said.(type) {
		case *string:
			if *said != "" {
				add(*said)
			}
		case **uint32:
			if *said != nil {
				number(**said)
			}
		case *[]uint32:
			for _, n := range *said {
				number(n)
			}
		}
	}
	if len(list) == 0 {
		return nil, r.Errorf("run says nothing by which the process is recognised; add one of %s", anchors())
	}
	if weak := selector.Identify(list); weak != nil {
		key := weak.Kind.Key
		return nil, r.At(key).Errorf("run.%s stands alone, with nothing that identifies a process: %s; add one of %s", key, weak.Kind.Weak, anchors())
	}
	return list, nil
}

// anchors are the keys of run that may stand alone.
func anchors() string {
	var keys []string
	for _, kind := range selector.Kinds() {
		if kind.Anchor {
			keys = append(keys, kind.Key)
		}
	}
	return strings.Join(keys, ", ")
}

func formatRun(hosts, selectors []string) (runSpec, error) {
	run := runSpec{Hosts: hosts}
	for _, text := range selectors {
		for _, key := range run.keys() {
			value, ok := strings.CutPrefix(text, key.kind+":")
			if !ok {
				continue
			}
			if said, isText := key.said.(*string); isText {
				*said = value
				continue
			}
			n, err := strconv.ParseUint(value, 10, 32)
			if err != nil {
				return run, fmt.Errorf("selector %q: %w", text, err)
			}
			id := uint32(n)
			switch said := key.said.(type) {
			case **uint32:
				*said = &id
			case *[]uint32:
				*said = append(*said, id)
			}
		}
	}
	if again, err := run.selectors(); err != nil || !slices.Equal(again, selectors) {
		return run, fmt.Errorf("selectors %q cannot be said in a file", selectors)
	}
	return run, nil
}
