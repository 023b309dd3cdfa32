package manifest

import (
	"fmt"
	"slices"
	"strconv"

	"github.com/entente-mesh/entente/federation/catalog"
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

// selectors in a fixed order, so that the same file gives the same record.
func (r *runSpec) selectors() ([]string, error) {
	var list []string
	add := func(kind, value string) {
		if value != "" {
			list = append(list, kind+":"+value)
		}
	}
	number := func(n *uint32) string {
		if n == nil {
			return ""
		}
		return strconv.FormatUint(uint64(*n), 10)
	}
	add("systemd:unit", r.Systemd)
	add("container:id", r.Container)
	add("unix:user", r.User)
	add("unix:uid", number(r.UID))
	add("unix:gid", number(r.GID))
	for _, group := range r.Groups {
		add("unix:group", number(&group))
	}
	add("unix:path", r.Path)
	add("unix:sha256", r.SHA256)
	add("unix:cmdline", r.Cmdline)
	add("run:id", r.Run)
	identified := r.User != "" || r.UID != nil || r.SHA256 != "" || r.Systemd != "" || r.Container != ""
	switch {
	case len(list) == 0:
		return nil, r.Errorf("run says nothing by which the process is recognised; add systemd, user or uid")
	case !identified && r.Path != "":
		return nil, r.At("path").Errorf("run.path stands alone: any user may start a program from a path; add systemd, container, user or uid")
	case !identified && r.Cmdline != "":
		return nil, r.At("cmdline").Errorf("run.cmdline stands alone: a command line is what a process says of itself; add systemd, container, user or uid")
	case !identified && r.GID != nil:
		return nil, r.At("gid").Errorf("run.gid stands alone; add user or uid beside it")
	case !identified:
		return nil, r.Errorf("run says nothing that identifies a process; add systemd, user or uid")
	}
	return list, nil
}

func formatRun(hosts, selectors []string) (runSpec, error) {
	run := runSpec{Hosts: hosts}
	for _, selector := range selectors {
		kind, value := catalog.CutSelector(selector)
		switch kind {
		case "systemd:unit":
			run.Systemd = value
		case "container:id":
			run.Container = value
		case "unix:user":
			run.User = value
		case "unix:uid", "unix:gid", "unix:group":
			n, err := strconv.ParseUint(value, 10, 32)
			if err != nil {
				return run, fmt.Errorf("selector %q: %w", selector, err)
			}
			id := uint32(n)
			switch kind {
			case "unix:uid":
				run.UID = &id
			case "unix:gid":
				run.GID = &id
			default:
				run.Groups = append(run.Groups, id)
			}
		case "unix:path":
			run.Path = value
		case "unix:sha256":
			run.SHA256 = value
		case "unix:cmdline":
			run.Cmdline = value
		case "run:id":
			run.Run = value
		}
	}
	if again, err := run.selectors(); err != nil || !slices.Equal(again, selectors) {
		return run, fmt.Errorf("selectors %q cannot be said in a file", selectors)
	}
	return run, nil
}
