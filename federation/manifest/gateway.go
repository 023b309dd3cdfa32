package manifest

import (
	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/internal/yamlfile"
)

type gatewaySpec struct {
	yamlfile.Pos
	Run        runSpec `yaml:"run,required"`
	Datacenter string  `yaml:"datacenter,required"`
	Address    string  `yaml:"address,required"`
}

func (p *parser) gateway(d *document[gatewaySpec], object *statev1.Object) error {
	selectors, err := d.Spec.Run.selectors()
	if err != nil {
		return err
	}
	object.Kind = &statev1.Object_Gateway{Gateway: &statev1.Gateway{
		Name:       d.Metadata.Name,
		Datacenter: d.Spec.Datacenter,
		Address:    d.Spec.Address,
		Hosts:      d.Spec.Run.Hosts,
		Selectors:  selectors,
	}}
	return nil
}

func formatGateway(o *statev1.Object) (gatewaySpec, error) {
	g := o.GetGateway()
	run, err := formatRun(g.GetHosts(), g.GetSelectors())
	return gatewaySpec{Run: run, Datacenter: g.GetDatacenter(), Address: g.GetAddress()}, err
}
